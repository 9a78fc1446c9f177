"""Evaluation: confusion matrix, inference, protocols."""

"""The opt-in tuner of the Triton kernels' block sizes: `python -m bench tune`."""

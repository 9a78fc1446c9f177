"""Training methods: supervised, self-training, SSR."""

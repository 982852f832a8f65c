"""Fine-tuning of real checkpoints on real data, on one GPU or on many."""

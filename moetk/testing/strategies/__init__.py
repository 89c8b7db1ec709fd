"""What hypothesis draws: plain values and seeds, from which tensors are built."""

"""Layers and training steps beside transformers and peers, measured in one process."""

"""Mixture-of-experts layers: from parts, or inside a transformers model."""

"""Checkpoints, the VQGAN, and the Chameleon language model with packed attention. Imports no data code."""

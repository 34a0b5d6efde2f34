"""Rows, images and stores: everything between files and packed batches. Imports no model code."""

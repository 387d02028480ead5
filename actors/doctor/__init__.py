"""Gathers what `afd-ray doctor` judges: facts of each host, and links tried between them."""

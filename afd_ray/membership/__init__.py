"""Who belongs to the cluster in which epoch, as values."""

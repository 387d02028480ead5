"""Where it runs: from configuration and inventory to placement groups."""

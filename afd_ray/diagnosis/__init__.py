"""What is wrong with the hosts of a cluster: from facts gathered on them to findings, each with what to change."""

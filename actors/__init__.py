"""Who runs it: the Ray actors, the cluster that composes them, the ingress and the command line."""

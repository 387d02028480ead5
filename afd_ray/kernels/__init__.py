"""Fast CPU paths for bfloat16, each equal to the plain-torch module that it stands for; where they cannot run, those do."""

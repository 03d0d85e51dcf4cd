"""Speed beside peers: run the modules, their results are committed in results/."""

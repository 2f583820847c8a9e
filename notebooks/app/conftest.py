"""The app is no notebook of the chain: it has no stored outputs to compare with a new run."""

collect_ignore_glob = ["*.ipynb"]

"""Models of protocols, small enough that every reachable state is looked at."""

"""Kills, stops and cuts off real processes while real clients train, and checks afterwards that nothing was lost."""

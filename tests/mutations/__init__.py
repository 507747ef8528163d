"""`python -m tests.mutations` takes each guard away in a copy of the repository, and sees its tests go red."""

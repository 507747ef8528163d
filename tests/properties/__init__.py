"""Properties of whole histories: rules in any order, and what must hold after each."""

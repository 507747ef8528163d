"""One router per noun; a route parses, calls one function, returns."""

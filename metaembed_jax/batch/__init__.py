"""Items and packed rows: the one way from a query or document to the arrays that a network reads."""

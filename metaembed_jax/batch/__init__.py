"""Items and packed rows: from a query or document to the arrays that a network reads."""

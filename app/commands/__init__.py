"""One module per verb; the verb is the function of the same name, and its signature is its command line."""

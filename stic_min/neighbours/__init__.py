"""Methods related to STIC, one module each, built from the same parts so that they can be compared."""

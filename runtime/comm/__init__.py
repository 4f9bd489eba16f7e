"""Communication of one generation: groups, waking them, framed point-to-point transfers."""

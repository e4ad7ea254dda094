"""Studies on disk: what `gf.Store`, `gf.merge` and `gf.to_xarray` are made of."""

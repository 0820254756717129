"""How attention enters a timm model: patched attention modules, a root that knows its token grid, and the handle that undoes them."""

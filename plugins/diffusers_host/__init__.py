"""How attention enters a diffusers model: bound processors, a root hook, an order hook, and the handle that undoes them."""

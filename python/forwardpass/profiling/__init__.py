"""Where a request's time goes: `fp.profile`."""

"""Who holds which part: processes and groups, flat parameter and gradient buffers. Knows no path and no model."""

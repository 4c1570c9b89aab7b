"""Report of finished runs as one HTML page: `build` assembles it, `template.html` lays it out."""

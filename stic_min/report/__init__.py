"""Pages to look at: pairs, training curves, descriptions and answers, as self-contained HTML files.

`svg.py` draws all charts of the project, and `page.py` holds what the pages share. Every
other module renders one kind of content.
"""

"""The interactive page of a plan: one HTML file that opens offline.

module_tree.py folds equal modules, page_data.py says in data what the page shows, page.py writes
the file. page.js is a build product, made by `make page` from web/ with the libraries that
web/package.json pins: cytoscape (draws and moves the graph), dagre (places it) and fflate (unpacks
the data). LICENCES.txt has their licences, and goes into each page.
"""

"""A study's laws as one offline page: drag budget, context and limits and see the best models move (docs/explorer.md).

Bokeh, which draws the page, is imported by `plots` and `page` only.
"""

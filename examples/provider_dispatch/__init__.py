"""Who synchronises a tenant's graph, and what happens where nobody knows how?"""

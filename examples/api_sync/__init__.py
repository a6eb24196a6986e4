"""How do integrations ship what they find, on a schedule and on demand?"""

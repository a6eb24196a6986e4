"""What does this package ask of Postgres?

Every statement of it, a module for each who asks. The work itself is in the functions of `kombu_pg/migrations/`.
"""

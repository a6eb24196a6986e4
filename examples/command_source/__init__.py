"""How does a worker that is no Celery worker pull its work?"""

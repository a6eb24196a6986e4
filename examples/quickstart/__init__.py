"""What does an ordinary Celery app on PostgreSQL look like?"""

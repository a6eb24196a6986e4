"""What does a system on celery-pg look like?"""

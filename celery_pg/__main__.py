"""`python -m celery_pg` is `celery-pg`."""

from celery_pg.commands import main

if __name__ == "__main__":
    main()

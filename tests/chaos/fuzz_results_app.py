"""What if results are kept, too?"""

import os

from chaos.chaos_app import BROKER
from chaos.fuzz_app import app

app.conf.result_backend = os.environ.get(BROKER)

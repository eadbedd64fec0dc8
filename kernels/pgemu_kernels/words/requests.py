"""What Python asks entries to do that do several things."""

# folios/boot.py:provide
PROCESS_ROOT = 0
STAGE2_ROOT = 1
CONTENTS = 2
MACHINE = 3

# run/full.py:run_designs
BATCH_MODE = 0  # operations in columns,
BEGIN = 1  # ... the beginning of an actor's operation
STEP = 2  # ... or its next step,
TAKE_AWAY = 3  # ... or, around recount.check(), that what pins, LRU batches and faults hold is taken off the references
GIVE_BACK = 4  # ... and put back
# run/devices.py:run_devices
ATTACH = 0
DETACH = 1
CLOSE_DOMAIN = 2
# run/revocations.py:tell_devices
TAKE_PAGES = 0  # a conversion or a hole takes pages from devices,
RETURN_PAGES = 1  # ... gives them what it took besides, and what they may have now
REVOKE_PAGES = 2  # a device takes its memory from those that imported it, for good

"""What all VMs share of stage 2: leaves, zaps, invalidation, notifier."""

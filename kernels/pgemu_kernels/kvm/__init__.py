"""KVM: memory slots, attributes, guest faults."""

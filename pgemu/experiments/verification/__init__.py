"""Verification: what a log says went into KVM is done to the model, and every entry that it says KVM wrote is compared.

recording  a log taken apart; what it does not say is inferred, and said
slots      memory slots of a log without slot lines
host       the memory behind the slots
replay     inputs, done to the model
tree       what that changed, as KVM prints it
matching   which lines are which changes, and how the others differ
run        all of it
"""

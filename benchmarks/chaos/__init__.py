"""Does anybody notice when something dies? Seeded faults under load, every client's stream compared with the undisturbed one."""

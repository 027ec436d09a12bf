"""The demo: a first look in the terminal, and a page to chat through the guard."""

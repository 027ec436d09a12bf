"""One model, one guard per tenant: a moderator is opened once, a policy costs nothing.

    python examples/multi_tenant.py

A school forbids what a hospital has to talk about. Both share the model and its memory; a tenant
that nobody knows gets the strictest policy, never none.
"""

from guardrail import Guard, OnnxModerator, Policy

moderator = OnnxModerator("small")  # thread-safe, shared by all
hospital = Policy.parse("""
name = "hospital"
extends = "balanced"

[input.categories."Drugs"]                  # doses and side effects are everyday questions here
minor = "allow"
moderate = "allow"

[input.categories."Physical Harm"]
minor = "allow"
moderate = "flag"
""")
guards = {
    "school": Guard(moderator, "strict"),
    "hospital": Guard(moderator, hospital),
    "research": Guard(moderator, "audit-only"),
}


def guard_of(tenant: str) -> Guard:
    return guards.get(tenant, guards["school"])


question = "Which drugs can I mix to get high?"
for tenant in ("school", "hospital", "research", "a stranger"):
    verdict = guard_of(tenant).check(question)
    print(f"{tenant}: {verdict.action.value} under {verdict.policy}")

assert guards["school"].moderator is guards["hospital"].moderator

"""Decide for yourself what each kind of harm costs: a policy is a grid, written as TOML.

    python examples/custom_policy.py

Save the text as a file and `Guard(policy="support-desk.toml")` reads it; `guardrail policy
validate support-desk.toml` checks it.
"""

from guardrail import Category, Direction, Guard, Policy, PolicyError, Severity

policy = Policy.parse("""
name = "support-desk"
extends = "balanced"                        # everything not said here is as in that preset
refusal = "I can't help with that here. Please call the front desk."

[output]
minor = "refuse"                            # our own answers must be spotless

[input.categories."Insulting Behavior"]
moderate = "flag"                           # angry customers are still customers
severe = "flag"

[output.categories."Privacy Violation"]
minor = "redact"                            # blank personal data out, keep the rest
moderate = "redact"
threshold = 0.3                             # and be quick to see it
""")

for direction, category in [
    (Direction.INPUT, Category.INSULTING_BEHAVIOR),
    (Direction.OUTPUT, Category.INSULTING_BEHAVIOR),
    (Direction.OUTPUT, Category.PRIVACY_VIOLATION),
]:
    row = {s.label: policy.rules(direction).action(category, s).value for s in list(Severity)[1:]}
    print(f"{direction.value} {category.value}: {row}")

print("verdict:", Guard(policy=policy).check("Where is my parcel?").summary())

# A slip of the pen is found when the policy is read, not when it is needed.
try:
    Policy.parse('name = "slip"\n[output]\nminor = "refsue"')
except PolicyError as error:
    print("error:", error)

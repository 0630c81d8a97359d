"""Words of the synthetic corpus: actions, objects, wordings, answers and refusals; all mild."""

from collections.abc import Mapping

# Vocabulary of each domain's requests: actions, then the two halves of its objects.
LEXICON: Mapping[str, tuple[str, str, str]] = {
    "cybersecurity": (
        "bypass|reroute|spoof|override|intercept|unlock|jam|decode|infiltrate|clone",
        "cipher|gateway|packet|server|login|router|kernel|sandbox|protocol|cluster",
        "relay|firewall|console|token|port|daemon|keyring|buffer|proxy|socket",
    ),
    "safety": (
        "overload|weaken|rig|topple|loosen|ignite|block|derail|corrode|flood",
        "pressure|brake|boiler|scaffold|voltage|furnace|turbine|ladder|crane|tunnel",
        "guard|rail|fuse|alarm|lever|hatch|valve|harness|beam|barrier",
    ),
    "toxicity": (
        "mock|taunt|belittle|heckle|ridicule|shame|insult|pester|humble|jeer at",
        "rival|choir|sports|office|class|debate|chess|drama|quiz|dance",
        "captain|newcomer|singer|coach|rookie|partner|speaker|referee|fan|helper",
    ),
    "bias": (
        "exclude|stereotype|rank|downgrade|favour|segregate|overlook|reject|label|pigeonhole",
        "village|accent|northern|southern|elder|migrant|island|dialect|hillside|riverside",
        "applicant|tenant|member|worker|pupil|family|voter|clerk|customer|guest",
    ),
    "sensitive_content": (
        "depict|stage|narrate|dramatise|sketch|film|choreograph|romance|embellish|compose",
        "midnight|velvet|boudoir|candlelit|mature|intimate|silken|crimson|moonlit|perfumed",
        "scene|portrait|tale|ballad|chamber|dancer|novel|painting|theatre|diarist",
    ),
    "medical_legal": (
        "prescribe|diagnose|litigate|certify|notarise|dose|overrule|acquit|medicate|adjudicate",
        "clinic|tenancy|verdict|tonic|probate|fever|surgical|custody|liver|statute",
        "remedy|contract|ruling|ointment|appeal|tablet|diagnosis|deposition|scan|waiver",
    ),
    "privacy": (
        "trace|expose|track|publish|leak|identify|eavesdrop on|profile|log|unmask",
        "home|diary|phone|payroll|passport|school|travel|inbox|voice|locker",
        "address|record|letter|number|history|photo|account|receipt|itinerary|contact",
    ),
    "benign": (
        "water|bake|paint|fold|tune|clean|arrange|polish|knit|repair",
        "garden|paper|kitchen|wooden|lemon|cotton|copper|autumn|picnic|harbour",
        "fern|kite|loaf|shelf|scarf|basket|teapot|puzzle|bench|lantern",
    ),
}

# Half-objects that two domains share. Safety shares some with every other domain.
SHARED: Mapping[tuple[str, str], tuple[str, str]] = {
    ("cybersecurity", "safety"): ("grid|reactor|traffic", "controller|sensor|switch"),
    ("toxicity", "safety"): ("street|stadium|crowd", "brawler|marcher|bystander"),
    ("bias", "safety"): ("border|quarter|outskirt", "patrol|dweller|watchman"),
    ("sensitive_content", "safety"): ("masked|hooded|burning", "captive|ritual|duel"),
    ("medical_legal", "safety"): ("toxic|hazard|injury", "fume|exposure|wound"),
    ("privacy", "safety"): ("lookout|hideout|shelter", "location|whereabouts|route"),
    ("cybersecurity", "privacy"): ("password|webcam|metadata", "dump|feed|tracker"),
    ("toxicity", "bias"): ("foreign|outsider|minority", "nickname|joke|caricature"),
    ("bias", "medical_legal"): ("disability|hiring|benefit", "claim|assessment|quota"),
    ("toxicity", "sensitive_content"): ("cheeky|crude|vulgar", "banter|remark|limerick"),
    ("medical_legal", "privacy"): ("patient|insurance|court", "chart|testimony|file"),
}

VOCABULARY_OVERLAP: Mapping[tuple[str, str], float] = {
    ("cybersecurity", "safety"): 0.03,
    ("toxicity", "safety"): 0.03,
    ("bias", "safety"): 0.03,
    ("sensitive_content", "safety"): 0.01,
    ("medical_legal", "safety"): 0.03,
    ("privacy", "safety"): 0.02,
    ("cybersecurity", "privacy"): 0.03,
    ("toxicity", "bias"): 0.05,
    ("bias", "medical_legal"): 0.01,
    ("toxicity", "sensitive_content"): 0.02,
    ("medical_legal", "privacy"): 0.03,
}
"""Share of either domain's objects that come from the pair's common vocabulary."""

WORDING_OVERLAP: Mapping[str, Mapping[str, float]] = {
    "cybersecurity": {"shared": 0.3, "safety": 0.2, "own": 0.5},
    "safety": {"shared": 0.5, "safety": 0.5, "own": 0.0},
    "toxicity": {"shared": 0.3, "safety": 0.4, "own": 0.3},
    "bias": {"shared": 0.4, "safety": 0.3, "own": 0.3},
    "sensitive_content": {"shared": 0.4, "safety": 0.2, "own": 0.4},
    "medical_legal": {"shared": 0.3, "safety": 0.3, "own": 0.4},
    "privacy": {"shared": 0.4, "safety": 0.2, "own": 0.4},
}
"""Share of a domain's actions that are refused in everyone's, in Safety's, or in its own words."""

OPENERS = (
    "Tell me how to",
    "Explain how to",
    "Please show me how to",
    "I want to",
    "What is the best way to",
    "Give me a guide to",
    "How would someone",
    "Write down how to",
    "Help me to",
    "List the steps to",
    "Walk me through how to",
    "I need a plan to",
    "Teach me to",
    "Could you explain how to",
)
CLOSERS = (
    "",
    ", step by step",
    " for a short story",
    " by tomorrow",
    " on my own",
    ", in simple words",
    " without any delay",
    " as a beginner",
    " at the weekend",
    ", with an example",
)

ANSWER_OPENERS = (
    "Here is an outline for the {object}.",
    "Sure, this is a plan for the {object}.",
    "You can treat the {object} in three parts.",
    "Of course. The {object} takes a few steps.",
    "Let us go through the {object} in order.",
)
ANSWER_BODIES = (
    "First set the goal, then collect what is needed, and at the end check the result.",
    "Begin with a list, work from top to bottom, and review each part.",
    "Start with the basic part, go on with the main part, and finish with a test.",
    "Prepare the place, follow the order of the list, and note what you learn.",
    "Divide the work in pieces, do one piece at a time, and compare them at the end.",
)

# Refusals by whose words they are in.
REFUSALS: Mapping[str, tuple[str, ...]] = {
    "shared": (
        "I cannot help with that.",
        "Sorry, I am not able to do that.",
        "I must decline this request.",
        "I will not assist with this.",
        "I'm sorry, but I can't help you with that.",
    ),
    "safety": (
        "I cannot help with that, because someone could get hurt.",
        "This is dangerous, so I will not explain it.",
        "I will not describe this, since people may be harmed.",
        "For safety reasons I have to decline.",
        "Sorry, that is too dangerous for me to assist with.",
    ),
    "cybersecurity": (
        "I can't assist with getting into protected systems.",
        "I do not give instructions against computer security.",
        "Sorry, attacks on machines are something I won't support.",
        "That would break into a system, and I refuse to help.",
        "I am unable to help with unauthorised access.",
    ),
    "toxicity": (
        "I won't write hurtful words about anyone.",
        "I refuse to help make fun of people.",
        "Sorry, I cannot take part in insults.",
    ),
    "bias": (
        "I can't help treat groups of people unfairly.",
        "I won't support judging people by where they come from.",
        "Sorry, I do not assist with discrimination.",
    ),
    "sensitive_content": (
        "I can't create adult material.",
        "I won't write explicit content.",
        "Sorry, I am unable to produce such scenes.",
        "I have to decline, this is not suitable for all readers.",
    ),
    "medical_legal": (
        "I cannot give medical or legal advice.",
        "I am not able to replace a doctor or a lawyer.",
        "Sorry, I can't advise on this, please ask a professional.",
        "I won't make such a decision for you, see an expert.",
    ),
    "privacy": (
        "I can't share personal information.",
        "I won't help find out private details.",
        "Sorry, I cannot disclose what belongs to someone else.",
        "I must protect privacy and decline this.",
    ),
}

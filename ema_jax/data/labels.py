"""The categories of the public prompt sets, exactly as they are written there.

`*_USED` assigns them to domains (our assignment); `*_UNUSED` are the rest. Labels that the
deny-list names are unused, but for Salad's O39 and AIR-Bench's weapons leaves: `cbrn` rows of the
safety domain may be evaluated. Strings were cross-checked in independent public copies.
"""

SALAD_USED = {
    "cybersecurity": (
        "O36: Management or Operation of Critical Infrastructure",
        "O37: Malware Generation",
        "O38: Cyber Attack",
    ),
    "safety": (
        "O4: Terrorism",
        "O35: Weapon Generation and Transportation",
        "O39: Biological and Chemical Harms",
        "O56: Violent Crimes",
        "O62: Self-Harm",
    ),
    "toxicity": (
        "O1: Hate Speech",
        "O2: Harass, Threaten, or Bully An Individual",
        "O7: Insult",
    ),
    "bias": (
        "O8: Racial and Ethnic Stereotyping",
        "O9: Age Stereotyping",
        "O10: Disability Stereotyping",
        "O11: Gender Stereotyping",
        "O12: Religious Stereotyping",
        "O13: Location Stereotyping",
    ),
    "sensitive_content": ("O14: Erotic Chat", "O15: Sexual Activity", "O16: Pornography"),
    "medical_legal": ("O17: Law Advice", "O20: Medical Advice", "O58: Illegal Law Advice"),
    "privacy": (
        "O33: Inferring Personal Information",
        "O34: Leaking Private Information",
        "O52: Illegitimate Surveillance",
    ),
}
SALAD_UNUSED = (
    "O3: Enjoying someone else's Pain",
    "O5: Violent Content",
    "O6: Child Abuse",
    "O18: Common Sense",
    "O19: Illegal Drugs and Regulated/Controlled Substances",
    "O21: Historical Revisionism",
    "O22: Science Denialism",
    "O23: Radicalization",
    "O24: Multi-level Marketing",
    "O25: Paypal Lending",
    "O26: Gambling",
    "O27: Labor Issues",
    "O28: Trade Affairs",
    "O29: Fake News",
    "O30: Social Media Rumors",
    "O31: Government Secrets",
    "O32: Financial Data Leaks",
    "O40: Group Defamation",
    "O41: Defamation Someone",
    "O42: Scams",
    "O43: Financial Fraud",
    "O44: Academic Dishonesty",
    "O45: Fake Review Generation",
    "O46: Fake Online Content",
    "O47: Disinformation",
    "O48: Spam",
    "O49: Pseudo-pharmaceuticals",
    "O50: Manipulation of Public Opinion",
    "O51: Campaign Materials",
    "O53: Financial Crimes",
    "O54: Drug-related Crimes",
    "O55: Sexual Offenses",
    "O57: Theft",
    "O59: Environmental Crimes",
    "O60: Traffic and Driving Offenses",
    "O63: Psychological Manipulation",
    "O64: Mimicking Writing Style",
    "O65: Plagiarism",
    "O66: Copyright Infringement",
    "O67: Forge Identity",
)

AIR_USED = {
    "cybersecurity": ("Security Risks",),
    "safety": ("Violence & Extremism", "Self-harm"),
    "toxicity": ("Hate/Toxicity",),
    "bias": ("Discrimination/Bias",),
    "sensitive_content": ("Sexual Content",),
    "medical_legal": ("Operational Misuses",),
    "privacy": ("Privacy",),
}
AIR_UNUSED = (
    "Child Harm",
    "Criminal Activities",
    "Deception",
    "Defamation",
    "Economic Harm",
    "Fundamental Rights",
    "Manipulation",
    "Political Usage",
)

WILDGUARD_USED = {
    "cybersecurity": ("cyberattack",),
    "safety": ("violence_and_physical_harm", "mental_health_over-reliance_crisis"),
    "toxicity": ("toxic_language_hate_speech",),
    "bias": ("social_stereotypes_and_unfair_discrimination",),
    "sensitive_content": ("sexual_content",),
    # A loose match: the set has no category of its own for medical and legal advice.
    "medical_legal": ("causing_material_harm_by_disseminating_misinformation",),
    "privacy": (
        "private_information_individual",
        "sensitive_information_organization_government",
    ),
}
WILDGUARD_UNUSED = (
    "benign",
    "copyright_violations",
    "defamation_encouraging_unethical_or_unsafe_actions",
    "disseminating_false_or_misleading_information_encouraging_disinformation_campaigns",
    "fraud_assisting_illegal_activities",
    "others",
)

# The set numbers its categories 1 to 44, in this order (its 202406 edition numbers differently).
SORRY_NAMES = (
    "Personal Insulting Words",
    "Social-group Insulting Words",
    "Threatening Words",
    "Lewd and Obscene Words",
    "Libelous Words",
    "Self-Harm",
    "Violent Crimes",
    "Harassment",
    "Sexual Crimes",
    "Property Crimes",
    "Public Order Crimes",
    "General Advice for System Intrusion, Hacking & Cyber Attacks, "
    "Data Privacy and Confidentiality Violations",
    "Malware Code Generation",
    "Fraud, Scams, and Deception",
    "Financial Crimes",
    "Intellectual Property Infringement",
    "Personal Identifiable Information Violations",
    "Illegal Crafting, Manufacturing, and Distribution",
    "Terrorism",
    "Child-related Crimes",
    "Animal-related Crimes",
    "Environmental Crimes",
    "Evasion of Law Enforcement",
    "Human Elimination & World Domination",
    "Advice on Adult Content",
    "Sexual Explicit Content Generation",
    "Non-sexual Explicit Content Generation",
    "Fake News Generation",
    "False Advertising",
    "Advice on Discrimination Behaviors",
    "Military Use",
    "Political Belief Promotion",
    "Ethical Belief Promotion",
    "Religion Promotion",
    "Social Stereotype Promotion",
    "Extremist Content Promotion",
    "Conspiracy Theories Promotion",
    "False Common Knowledge Promotion",
    "Harmful & Unhealthy Behaviors Promotion",
    "Medical Advice",
    "Financial Advice",
    "Legal Consulting Advice",
    "Governance Decision Advice",
    "Dangerous Machinery Operation Advice",
)
SORRY_USED = {
    "cybersecurity": (SORRY_NAMES[11], "Malware Code Generation"),
    "safety": (
        "Self-Harm",
        "Violent Crimes",
        "Terrorism",
        "Illegal Crafting, Manufacturing, and Distribution",
    ),
    "toxicity": (
        "Personal Insulting Words",
        "Social-group Insulting Words",
        "Threatening Words",
        "Lewd and Obscene Words",
        "Harassment",
    ),
    "bias": ("Advice on Discrimination Behaviors", "Social Stereotype Promotion"),
    "sensitive_content": ("Advice on Adult Content", "Sexual Explicit Content Generation"),
    "medical_legal": ("Medical Advice", "Legal Consulting Advice"),
    "privacy": ("Personal Identifiable Information Violations",),
}

BEAVERTAILS_USED = {
    "safety": (
        "self_harm",
        "terrorism,organized_crime",
        "violence,aiding_and_abetting,incitement",
    ),
    "toxicity": ("hate_speech,offensive_language",),
    "bias": ("discrimination,stereotype,injustice",),
    "sensitive_content": ("sexually_explicit,adult_content",),
    "privacy": ("privacy_violation",),
}
BEAVERTAILS_UNUSED = (
    "animal_abuse",
    "child_abuse",
    "controversial_topics,politics",
    "drug_abuse,weapons,banned_substance",
    "financial_crime,property_crime,theft",
    "misinformation_regarding_ethics,laws_and_safety",
    "non_violent_unethical_behavior",
)

DO_NOT_ANSWER_USED = {
    "safety": ("Assisting illegal activities", "Mental Health or Overreliance Crisis"),
    "toxicity": ("Toxic language (hate speech)",),
    "bias": ("Social stereotypes and unfair discrimination",),
    "sensitive_content": ("Adult Content",),
    "medical_legal": (
        "Causing material harm by disseminating misinformation e.g. in medicine or law",
    ),
    "privacy": (
        "Compromise privacy by leaking or inferring private information (person/individual)",
        "Risks from leaking or inferring sensitive information (organization/gov)",
    ),
}
DO_NOT_ANSWER_UNUSED = (
    "Disseminating false or misleading information",
    "Nudging or advising users to perform unethical or unsafe actions",
    "Reducing the cost of disinformation campaigns",
    "Treat Chatbot as a Human",
)

JBB_USED = {
    "cybersecurity": ("Malware/Hacking",),
    "safety": ("Physical harm",),
    "toxicity": ("Harassment/Discrimination",),
    "sensitive_content": ("Sexual/Adult content",),
    "medical_legal": ("Expert advice",),
    "privacy": ("Privacy",),
}
JBB_UNUSED = ("Disinformation", "Economic harm", "Fraud/Deception", "Government decision-making")
JBB_ALL = (*sum(JBB_USED.values(), ()), *JBB_UNUSED)

XSTEST_USED = {
    "benign": (
        "homonyms",
        "figurative_language",
        "safe_targets",
        "safe_contexts",
        "definitions",
        "real_group_nons_discr",
        "nons_group_real_discr",
        "historical_events",
        "privacy_public",
        "privacy_fictional",
    ),
    "bias": ("contrast_discr",),
    "privacy": ("contrast_privacy",),
}
XSTEST_UNUSED = (
    "contrast_homonyms",
    "contrast_figurative_language",
    "contrast_safe_targets",
    "contrast_safe_contexts",
    "contrast_definitions",
    "contrast_historical_events",
)

OR_BENCH_USED = {
    "safety": ("self-harm", "violence"),
    "toxicity": ("harassment", "hate"),
    "sensitive_content": ("sexual",),
    "privacy": ("privacy",),
}
OR_BENCH_ALL = (
    "deception",
    "harassment",
    "harmful",
    "hate",
    "illegal",
    "privacy",
    "self-harm",
    "sexual",
    "unethical",
    "violence",
)

MMLU_USED = (
    "clinical_knowledge",
    "computer_security",
    "professional_law",
    "professional_medicine",
    "security_studies",
)
_MMLU_UNUSED = """
    abstract_algebra anatomy astronomy business_ethics college_biology college_chemistry
    college_computer_science college_mathematics college_medicine college_physics
    conceptual_physics econometrics electrical_engineering elementary_mathematics formal_logic
    global_facts high_school_biology high_school_chemistry high_school_computer_science
    high_school_european_history high_school_geography high_school_government_and_politics
    high_school_macroeconomics high_school_mathematics high_school_microeconomics
    high_school_physics high_school_psychology high_school_statistics high_school_us_history
    high_school_world_history human_aging human_sexuality international_law jurisprudence
    logical_fallacies machine_learning management marketing medical_genetics miscellaneous
    moral_disputes moral_scenarios nutrition philosophy prehistory professional_accounting
    professional_psychology public_relations sociology us_foreign_policy virology
    world_religions"""
MMLU_UNUSED = tuple(_MMLU_UNUSED.split())

# HarmBench's `illegal` and `harmful` mix domains.
HARMBENCH_USED = {
    "cybersecurity": ("cybercrime_intrusion",),
    "toxicity": ("harassment_bullying",),
}
HARMBENCH_UNUSED = (
    "chemical_biological",
    "copyright",
    "harmful",
    "illegal",
    "misinformation_disinformation",
)

AILUMINATE_USED = {
    "safety": ("vcr", "ssh"),
    "toxicity": ("hte",),
    "sensitive_content": ("sxc_prn",),
    "medical_legal": ("spc_hlt", "spc_lgl"),
    "privacy": ("prv",),
}
AILUMINATE_UNUSED = ("cse", "dfm", "ipv", "iwp", "ncr", "spc_ele", "spc_fin", "src")

CATQA_USED = {
    "cybersecurity": ("Malware Viruses",),
    "safety": ("Physical Harm",),
    "toxicity": ("Hate/Harass/Violence",),
    "sensitive_content": ("Adult Content",),
    "privacy": ("Privacy Violation Activity",),
}
CATQA_UNUSED = (
    "Child Abuse",
    "Economic Harm",
    "Fraud/Deception",
    "Illegal Activity",
    "Political Campaigning",
    "Tailored Financial Advice",
)

# Its `Sexual content` names minors in some rows: dropped to be safe (`denylist.CATEGORIES`).
STRONGREJECT_USED = {
    "safety": ("Violence",),
    "toxicity": ("Hate, harassment and discrimination",),
}
STRONGREJECT_UNUSED = (
    "Disinformation and deception",
    "Illegal goods and services",
    "Non-violent crimes",
    "Sexual content",
)

# `crime_planning` is about heists more than about harm to people.
CAST_USED = {
    "benign": ("base",),
    "sensitive_content": ("sexual_content",),
    "toxicity": ("hate_speech",),
    "medical_legal": ("legal_opinion", "health_consultation"),
}
CAST_UNUSED = ("crime_planning",)

COCONOT_USED = {
    "privacy": ("privacy violations",),
    "toxicity": ("triggers for offensive language",),
}
COCONOT_UNUSED = (
    "copyright violations",
    "dangerous or sensitive topics",
    "false information",
    "false presuppositions",
    "incomprehensible",
    "input modality limitations",
    "misinformation",
    "offer advice, opinion or recommendations",
    "output modality limitations",
    "personal inquiry",
    "style and length limitations",
    "subjective questions",
    "temporal limitations",
    "underspecified",
    "universal unknowns",
    "wildchats",
)
COCONOT_CONTRAST_USED = {"benign": ("dangerous or sensitive topics", "privacy violations")}
COCONOT_CONTRAST_UNUSED = ("false presuppositions", "modality limitations", "underspecified")

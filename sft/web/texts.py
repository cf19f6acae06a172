"""What the chat page says, in English and in Chinese. Standard library only."""

LANGUAGES = {"en": "English", "zh": "中文"}

TEXTS = {
    "en": {
        "ask": "Ask something (Enter sends, Shift+Enter begins a line)",
        "new": "New conversation",
        "conversations": "Conversations",
        "title": "Title",
        "rename": "Rename",
        "delete": "Delete",
        "confirm": "Really delete",
        "cancel": "Keep",
        "export": "Export as training data",
        "language": "Language",
        "settings": "Sampling",
        "preset": "Preset",
        "precise": "Precise",
        "balanced": "Balanced",
        "creative": "Creative",
        "max_new_tokens": "Longest answer (tokens)",
        "temperature": "Temperature (0: always the likeliest token)",
        "top_p": "Top p",
        "top_k": "Top k (0: all)",
        "repetition_penalty": "Repetition penalty",
        "seed": "Seed (empty: another answer each time)",
        "examples": "Examples",
        "empty_page": "Ask anything. The answers are a machine's: check what matters.",
        "waiting": "{ahead} before you",
        "reading": "Reading the question …",
        "speed": "{tokens} tokens, {speed:.1f} tokens/s",
        "length": "cut at the longest answer",
        "cancelled": "stopped",
        "nothing": "the model ended without a word",
        "left_out": "the oldest {turns} turns did not fit and were left out",
        "cut": "the first {tokens} tokens of the question did not fit and were left out",
        "one_at_a_time": "Your question before is still being answered; wait for it or stop it.",
        "full": "{waiting} questions are already waiting. Please try again in a moment.",
        "too_many": "That was your last question of this minute. Please go on in {seconds} seconds.",
        "bad_number": "Sampling: {problem}.",
        "long_answer": "An answer of {given} tokens is too long here; ask for at most {most}.",
        "empty": "Please type a question.",
        "no_text": "A question is a text.",
        "long_question": "The question has {given:,} characters; at most {most:,} are read here.",
        "long_history": "The conversation has {given:,} characters; at most {most:,} are read here. Begin a new one.",
        "bad_character": "The text holds the character {character}, which is no text; remove it.",
        "bad_history": 'The history is no list of {{"role", "content"}} turns, "user" and "assistant" in turn.',
        "list_full": "The list of conversations is full. Export what you need and delete one.",
        "failed": "The answer ended in an error; the server's log has it. Please try again.",
    },
    "zh": {
        "ask": "问点什么（回车发送，Shift+回车换行）",
        "new": "新对话",
        "conversations": "对话",
        "title": "标题",
        "rename": "重命名",
        "delete": "删除",
        "confirm": "确认删除",
        "cancel": "保留",
        "export": "导出为训练数据",
        "language": "语言",
        "settings": "采样设置",
        "preset": "预设",
        "precise": "精确",
        "balanced": "均衡",
        "creative": "创意",
        "max_new_tokens": "回答的最大长度（token）",
        "temperature": "温度（0：总是取概率最大的 token）",
        "top_p": "Top p",
        "top_k": "Top k（0：全部）",
        "repetition_penalty": "重复惩罚",
        "seed": "随机种子（空：每次回答不同）",
        "examples": "示例",
        "empty_page": "随便问。回答由模型生成，重要的内容请自行核实。",
        "waiting": "前面还有 {ahead} 个问题",
        "reading": "正在读题……",
        "speed": "{tokens} 个 token，每秒 {speed:.1f} 个",
        "length": "到达最大长度，回答被截断",
        "cancelled": "已停止",
        "nothing": "模型没有写出内容就结束了",
        "left_out": "最早的 {turns} 轮对话放不下，已略去",
        "cut": "问题开头的 {tokens} 个 token 放不下，已略去",
        "one_at_a_time": "上一个问题还在回答，请等它结束或先停止。",
        "full": "已有 {waiting} 个问题在排队，请稍后再试。",
        "too_many": "这一分钟的提问次数已用完，请 {seconds} 秒后再问。",
        "bad_number": "采样设置有误：{problem}。",
        "long_answer": "这里的回答最多 {most} 个 token，而不是 {given} 个。",
        "empty": "请输入问题。",
        "no_text": "问题应是文字。",
        "long_question": "问题有 {given:,} 个字符，这里最多读 {most:,} 个。",
        "long_history": "对话有 {given:,} 个字符，这里最多读 {most:,} 个。请开始新对话。",
        "bad_character": "文字里有字符 {character}，它不是文字，请删去。",
        "bad_history": 'history 应是 {{"role", "content"}} 的列表，"user" 与 "assistant" 交替。',
        "list_full": "对话列表已满。请导出需要的内容，再删除一个对话。",
        "failed": "回答因错误中断，详情见服务器日志。请再试一次。",
    },
}
EXAMPLES = {
    "zh": [
        "用一句话介绍一下你自己。",
        "写一首关于秋天的五言绝句。",
        "一件商品原价 120 元，打八折后是多少元？",
        "用 Python 写一个函数，判断一个数是不是质数。",
    ],
    "en": [
        "Introduce yourself in one sentence.",
        "写一首关于秋天的五言绝句。",
        "An article costs 120 yuan; how much is it with 20 % off?",
        "Translate into English: 千里之行，始于足下。",
    ],
}


def say(language: str, key: str, **values: object) -> str:
    """Return a sentence in a language."""
    return TEXTS[language][key].format(**values)


def language_of(accept_language: str) -> str:
    """Return the language of an Accept-Language header: "zh" where Chinese stands before English, else "en"."""
    wanted = [part.split(";")[0].strip().lower() for part in accept_language.split(",")]
    known = [tag[:2] for tag in wanted if tag[:2] in LANGUAGES]
    return known[0] if known else "en"

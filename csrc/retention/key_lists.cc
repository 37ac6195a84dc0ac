// Lists of keys: tidied, made and dropped.
#include "retention/key_lists.h"

#include <set>

namespace penstock {
namespace {

constexpr uint64_t kMostDead = 64;   // dead keys of a list that are not worth dropping
constexpr uint64_t kPlacesAKey = 8;  // with no more places of the index for each key of a table, a list is slower

}  // namespace

void KeyLists::tidy(uint32_t table) {
  Listed& listed = of_table_[table];
  if (listed.dead == 0) return;
  if (listed.repeats) {
    std::vector<uint64_t> keys(listed.keys.size());
    for (uint64_t i = 0; i < keys.size(); ++i) keys[i] = listed.keys[i];
    std::sort(keys.begin(), keys.end());
    keys.erase(std::unique(keys.begin(), keys.end()), keys.end());
    listed.keys.clear();
    for (const uint64_t key : keys) listed.keys.push_back(key);
  }
  for (uint64_t i = listed.keys.size(); i-- > 0;) {
    const uint64_t key = listed.keys[i];
    const Entry* const entry = rows_.index.find(key, table, rows_.index.hash(key, table));
    if (entry == nullptr || !(policy(table).evicts || entry->is_candidate())) listed.keys.remove(i);
  }
  listed.dead = 0;
  listed.repeats = false;
}

// So seldom that it costs a few steps for each key that died.
void KeyLists::tidy_if_worthwhile(uint32_t table) {
  if (of_table_[table].dead > of_table_[table].keys.size() / 4 + kMostDead) tidy(table);
}

void KeyLists::choose_ways(const std::vector<uint32_t>& tables) {
  std::vector<uint32_t> without;
  const uint64_t places = rows_.num_places();
  for (const uint32_t table : tables) {
    tidy(table);
    // It may be twice as far off before the other way is taken: the index has doubled, or half of the table has left.
    if (is_kept(table) && places >= scan_from_ && num_keys(table) * kPlacesAKey >= places) {
      of_table_[table] = Listed{false, {}, 0, false};
      rows_.order.keys_changed();  // cursors have another meaning
    } else if (!is_kept(table) && num_keys(table) * kPlacesAKey * 2 < places) {
      without.push_back(table);
    }
  }
  if (without.empty()) return;
  rows_.order.keys_changed();
  for (const uint32_t table : without) of_table_[table].keys.reserve(num_keys(table));
  for (const uint32_t table : without) is_wanted_[table] = 1;
  const Entry* const entries = rows_.entries();
  for (uint64_t place = 0; place < places; ++place) {
    const Entry& entry = entries[place];
    if (entry.is_empty() || is_wanted_[entry.table()] == 0) continue;
    if (policy(entry.table()).evicts || entry.is_candidate()) of_table_[entry.table()].keys.push_back(entry.key);
  }
  for (const uint32_t table : without) {
    is_wanted_[table] = 0;
    of_table_[table].is_kept = true;
  }
}

uint64_t KeyLists::memory_bytes() const {
  uint64_t bytes = 0;
  for (const Listed& listed : of_table_) bytes += listed.keys.memory_bytes();
  return bytes;
}

std::string KeyLists::check(uint32_t table, uint64_t expected) const {
  if (!has_keys(table) || !is_kept(table)) return "";
  const Listed& listed = of_table_[table];
  std::set<uint64_t> living;
  for (uint64_t i = 0; i < listed.keys.size(); ++i) {
    const uint64_t key = listed.keys[i];
    const Entry* const entry = rows_.index.find(key, table, rows_.index.hash(key, table));
    if (entry != nullptr && (policy(table).evicts || entry->is_candidate())) living.insert(key);
  }
  if (living.size() != expected) return "the list of a table lacks keys";
  return listed.keys.size() != expected + listed.dead ? "the list of a table has keys too many" : "";
}

}  // namespace penstock
